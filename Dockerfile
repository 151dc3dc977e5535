FROM python:3.13-slim
WORKDIR /app

# The dependencies alone, so that a change of the code does not install them anew
# EXTRAS: of pyproject.toml, such as redis, with spaces between
ARG EXTRAS=""
COPY pyproject.toml .
RUN python -c "import os, tomllib; project = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
    extras = [project['optional-dependencies'][name] for name in os.environ['EXTRAS'].split()]; \
    print(*sum(extras, project['dependencies']), sep='\n')" \
    > /tmp/requirements.txt && pip install --no-cache-dir -r /tmp/requirements.txt && rm /tmp/requirements.txt

COPY kimi2api.py .
RUN python -m compileall -q kimi2api.py
# For SESSION_STORE=sqlite:/data/kimi2api.db
RUN mkdir /data && chown 65534:65534 /data
VOLUME /data
USER 65534:65534
ENV API_HOST=0.0.0.0 PYTHONDONTWRITEBYTECODE=1
EXPOSE 8088
HEALTHCHECK --interval=30s --timeout=5s --start-period=5s CMD ["python", "-c", \
    "import http.client, os; c = http.client.HTTPConnection((os.environ['API_HOST'] or '127.0.0.1').strip('[]'), int(os.environ.get('API_PORT') or 8088), timeout=4); c.request('GET', '/health'); raise SystemExit(c.getresponse().status != 200)"]
# The list form starts Python as process 1, so that `docker stop` reaches it; flags go after the image's name. With -m
# Python runs what is compiled already: a script's source stays in memory, 12 MB, while it runs
ENTRYPOINT ["python", "-m", "kimi2api"]
