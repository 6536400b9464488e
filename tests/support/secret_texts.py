"""Texts that hold a secret, and what is still to be seen of one."""

from __future__ import annotations

# made up, in the forms of the real ones
SECRETS = {
    "a password in a URL": "http://anna:Kanarie1@mlflow.example:5000/x",
    "a password with signs in a URL": "postgresql://anna:Kanarie1/x@y@db.example/mlflow",
    "a user or token in a URL": "https://Kanarie1@github.example/repo.git",
    "a signed S3 URL": "https://b.s3.example/k?X-Amz-Credential=Kanarie1&X-Amz-Signature=Kanarie1",
    "an old signed URL": "https://b.s3.example/k?AWSAccessKeyId=Kanarie1&Expires=1&Signature=Kanarie1",
    "a token in a query": "https://host.example/x?a=1&token=Kanarie1#top",
    **{f"a {name} in a query": f"https://host.example/x?{name}=Kanarie1" for name in ("secret", "pwd", "Token", "key")},
    **{f"a {name} in a query": f"host.example/x?a=1&{name}=Kanarie1" for name in ("auth", "sas", "jwt", "Api_Key")},
    "a query of any name": "s3://bucket/a.tar?whatever=Kanarie1",
    "an npm token": "npm_" + "Kanarie1" * 4,
    "a PyPI token": "pypi-" + "Kanarie1" * 4,
    "an AWS access key": "AKIA" + "KANARIE1KANARIE1",
    "a temporary AWS key": "ASIA" + "KANARIE1KANARIE1",
    "a Hugging Face token": "hf_" + "Kanarie1" * 4,
    "a GitHub token": "ghp_" + "Kanarie1" * 4,
    "a fine-grained GitHub token": "github_pat_" + "Kanarie1_" * 4,
    "a GitLab token": "glpat-" + "Kanarie1" * 3,
    "an OpenAI key": "sk-proj-" + "Kanarie1" * 4,
    "a Google key": "AIza" + "Kanarie1" * 4,
    "a Slack token": "xoxb-" + "Kanarie1-" * 2,
    "a Databricks token": "dapi" + "0123456789abcdef" * 2,
    "a JSON web token": "eyJKanarie1Kanarie1.eyJKanarie1Kanarie1.Kanarie1",
    "a bearer": "Authorization: Bearer Kanarie1Kanarie1",
    "a basic authorization": "'Authorization': 'Basic Kanarie1Kanarie1='",
    "a private key": "-----BEGIN RSA PRIVATE KEY-----\nKanarie1\n-----END RSA PRIVATE KEY-----",
}


NAMED = [
    "password=Kanarie1",
    "AWS_SECRET_ACCESS_KEY=Kanarie1",
    "{'api_key': 'Kanarie1'}",
    '{"token": "Kanarie1"}',
    "secret: Kanarie1",
    "token=Kanarie1",
    "db.passwd = 'Kanarie1'",
    "auth_token: Kanarie1",
    "credentials=Kanarie1, more",
]


def visible(text: str) -> bool:
    return any(part in text for part in ("anarie1", "ANARIE1", "0123456789abcdef0123"))
