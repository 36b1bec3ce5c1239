"""Make what measurements, tests and documents need: models of random weights, data, the page of keys."""

SUBJECTS = ("random-model", "nf4-model", "kept-base", "demo-data", "support-tickets", "configuration-page",
            "coming-from-page", "recipe-predictions", "memory-picture")
