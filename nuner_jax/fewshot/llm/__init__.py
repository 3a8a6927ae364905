"""Language models in context, as baselines of few-shot transfer: what they are shown, asked, and what they answer."""
