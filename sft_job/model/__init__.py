"""The trained model: skeleton, weights, attention, loss, recomputation."""
