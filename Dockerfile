FROM python:3.14-slim

# DONTWRITEBYTECODE: pip leaves no bytecode of itself behind (6 MB); what it installs is compiled all the same.
ENV PYTHONDONTWRITEBYTECODE=1 \
    HOST=0.0.0.0 \
    PORT=8000 \
    ENCRYPTION_KEY_FILE=/data/encryption_key

WORKDIR /app
COPY requirements.txt ./
RUN pip install --no-cache-dir -r requirements.txt

# For the encryption key: mount a volume here, which takes over the owner and mode. Without one, the key ends with the
# container, and every unread secret with it.
RUN mkdir -m 700 /data && chown 10001:10001 /data

# The brackets make the page a pattern: a build without it still works.
COPY main.py index.htm[l] ./

# A number, so that Kubernetes' runAsNonRoot can tell that it is not root.
USER 10001:10001
EXPOSE 8000
# 40 s: the service itself waits up to 30 s for PostgreSQL.
HEALTHCHECK --interval=5s --timeout=5s --start-period=40s --retries=3 \
    CMD ["python", "-c", \
        "import os, urllib.request as r; r.urlopen('http://127.0.0.1:' + os.environ['PORT'] + '/health', timeout=4)"]
CMD ["python", "main.py"]
