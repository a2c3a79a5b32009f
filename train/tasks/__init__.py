"""The parts of fine-tuning: examples out of files, features, scores; and what the three scripts share."""
