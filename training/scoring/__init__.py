"""How good a model is: pictures drawn for scoring, the scores of the protocols, and the curves over timesteps."""
