"""Fine-tuning of one BERT encoder on three tasks, with the heads and methods of five course reports."""
