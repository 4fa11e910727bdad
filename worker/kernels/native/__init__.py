"""What a generation step on a CPU does between its matrix products, as C that is compiled when a model is loaded."""
