"""What a first reading can skip: checks, files and URLs, the memory plan, CPU kernels, training data, the chat."""
