"""Merging of stored models: recipe, plan from headers, and the merge tensor by tensor."""
