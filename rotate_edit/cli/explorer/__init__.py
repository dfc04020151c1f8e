"""A local page: look channels up, put them in a cart, turn them by sliders, write a recipe or an edit."""
