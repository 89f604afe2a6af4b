"""A local stand-in for the API of the Hugging Face Hub: uploads and downloads of a small repository."""

import base64
import hashlib
import http.server
import json
import threading


class Hub:
    """Repositories in memory, as {'owner/name': {'file': bytes}}, served at `url`."""

    def __init__(self):
        self.repositories, self.private, self.requests = {}, {}, []
        hub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def do_POST(self):
                hub.requests.append(self.path)
                body = self.rfile.read(int(self.headers.get('Content-Length', 0)))
                reply(self, *hub.post(self.path, body, self.headers))

            def do_GET(self):
                reply(self, *hub.get(self.path))

            do_HEAD = do_GET  # noqa: N815

        def reply(handler, status, content, headers=None):
            content = content if isinstance(content, bytes) else json.dumps(content).encode()
            handler.send_response(status)
            for name, value in {'Content-Length': len(content), **(headers or {})}.items():
                handler.send_header(name, str(value))
            handler.end_headers()
            if handler.command != 'HEAD':
                handler.wfile.write(content)

        self.server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
        self.url = f'http://127.0.0.1:{self.server.server_port}'
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()

    def post(self, path, body, headers):
        """Returns status and content of the reply to a POST request."""
        if headers.get('Authorization') != 'Bearer hf_secret':
            return 401, {'error': 'Invalid username or password.'}
        if path == '/api/repos/create':
            asked = json.loads(body)
            name = '/'.join(filter(None, (asked.get('organization'), asked['name'])))
            if name in self.repositories:
                return 409, {'error': 'You already created this model repo', 'url': f'{self.url}/{name}'}
            self.repositories[name] = {}
            self.private[name] = asked.get('private', asked.get('visibility') == 'private')
            return 200, {'url': f'{self.url}/{name}', 'name': name}
        if path == '/api/validate-yaml':
            return 200, {'errors': [], 'warnings': []}
        owner, name, action = path.removeprefix('/api/models/').split('/')[:3]
        files = self.repositories[f'{owner}/{name}']
        if action == 'preupload':
            asked = json.loads(body)['files']
            plain = {'uploadMode': 'regular', 'shouldIgnore': False, 'oid': None}
            return 200, {'files': [{'path': file['path'], **plain} for file in asked]}
        for line in map(json.loads, body.splitlines()):
            if line['key'] == 'file':
                files[line['value']['path']] = base64.b64decode(line['value']['content'])
        return 200, {'commitUrl': f'{self.url}/{owner}/{name}/commit/{"0" * 40}', 'commitOid': '0' * 40}

    def get(self, path):
        """Returns status, content and headers of the reply to a GET or HEAD request."""
        parts = path.partition('?')[0].strip('/').split('/')
        name = '/'.join(parts[2:4] if parts[0] == 'api' else parts[:2])
        if name not in self.repositories:
            return 404, {'error': 'Repository not found'}, {'X-Error-Code': 'RepoNotFound'}
        files = self.repositories[name]
        if parts[0] == 'api':
            if 'tree' in parts:
                return 200, [
                    {'type': 'file', 'path': f, 'size': len(b), 'oid': 'x'} for f, b in files.items()
                ]
            return 200, {'id': name, 'sha': '0' * 40, 'siblings': [{'rfilename': file} for file in files]}
        file = '/'.join(parts[4:])
        if file not in files:
            return 404, {'error': 'Entry not found'}, {'X-Error-Code': 'EntryNotFound'}
        tag = hashlib.sha1(files[file]).hexdigest()
        return 200, files[file], {'ETag': f'"{tag}"', 'X-Repo-Commit': '0' * 40}
