"""What a model knows and says, measured."""
