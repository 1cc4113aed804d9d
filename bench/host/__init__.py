"""``python -m bench host``: where the host's time of a step goes, on small nets and stage by stage."""
