"""Manifests with which a run trains on Kubernetes, made from its run file.

    options.py           what the user asks for
    facts.py             what follows from run file and options: pods, ranks, names, folders
    estimate.py          memory of a pod, by the planner's dry run
    settings.py          arguments of the ranks, and the ConfigMap of a run file
    pods.py              the pod of the workers
    workers.py           Job, JobSet or TrainJob around it, and its headless Service
    coordinator.py       the coordinator's Deployment and Service
    storage.py           volume claims and Secrets
    network_policies.py  who may connect to whom
    monitoring.py        PodMonitor and PrometheusRule
    render.py            all objects of a run, in files

Objects are plain dicts. Torch-free, but for the estimate.

Not covered: a cluster. Nothing here talks to one.
"""
