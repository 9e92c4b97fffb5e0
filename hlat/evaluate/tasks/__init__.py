"""Tasks of HLAT's own, as the evaluation harness describes tasks: `lm_eval --include_path` takes this folder."""
