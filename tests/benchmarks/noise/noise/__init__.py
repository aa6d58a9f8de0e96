"""Clients that add noise to a model of any size in any number of arrays, through fedbasin or through FedAvg."""
