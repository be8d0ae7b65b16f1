"""How neighbors change the model's prediction."""
