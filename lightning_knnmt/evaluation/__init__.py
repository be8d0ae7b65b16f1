"""Quality, speed and tuning of translation systems."""
