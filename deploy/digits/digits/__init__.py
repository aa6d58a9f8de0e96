"""The digits example: an ordinary Flower app with fedbasin in it."""
