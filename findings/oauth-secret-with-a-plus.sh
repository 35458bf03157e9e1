#!/bin/bash
# Authlib and requests-oauthlib fetch no token with a client secret that has a plus in it: oidc-provider says invalid_client.
#
# RFC 6749 (2.3.1) wants id and secret percent-encoded before they go into the Basic login of the token endpoint. oidc-provider 9.13.3 (npm)
# decodes them; Authlib 1.9.10 and requests-oauthlib 2.0.0 (PyPI) do not encode, so a plus arrives as a space. Every second secret of 32
# random bytes in base64 has one: whoever sends by XOAUTH2 with them gets no token at one server, and does at another that does not decode.
# Before a new secret is asked for, send this one in the body (client_secret_post), or take a secret in hexadecimal.
#
#     Authlib 1.9.10: invalid_client
#     Authlib 1.9.10, client_secret_post: a token
#     requests-oauthlib 2.0.0: invalid_client
#     requests-oauthlib 2.0.0, include_client_id: a token
#     openid-client 6.9.0: a token
#     simple-oauth2 5.1.0: a token

# shellcheck source-path=SCRIPTDIR source=lib.sh
. "$(dirname "$0")/lib.sh"

obtain npm install --no-audit --no-fund --prefix . oidc-provider@9.13.3 openid-client@6.9.0 simple-oauth2@5.1.0
obtain pip install --no-input --target python Authlib==1.9.10 requests==2.34.1 requests-oauthlib==2.0.0

export SECRET=tHq+5Yz/R0mVw8s1uJc7KdP2oXn4EbGf6LaQ9iWyTk0= AUTHLIB_INSECURE_TRANSPORT=1 OAUTHLIB_INSECURE_TRANSPORT=1
cat >server.mjs <<'EOF'
import {Provider} from 'oidc-provider';

const client = {client_id: 'mailer', client_secret: process.env.SECRET, redirect_uris: [], response_types: []};
const clients = [{...client, grant_types: ['client_credentials']}];
const address = `http://127.0.0.1:${process.argv[2]}`;
const provider = new Provider(address, {clients, features: {clientCredentials: {enabled: true}}});
provider.listen(process.argv[2], '127.0.0.1', () => console.log('ready'));
EOF
cat >clients.py <<'EOF'
import os, sys
from importlib.metadata import version
sys.path.insert(0, "python")
from authlib.integrations.requests_client import OAuth2Session
from oauthlib.oauth2 import BackendApplicationClient
from requests_oauthlib import OAuth2Session as Session

url, secret = sys.argv[1], os.environ["SECRET"]

def attempt(name, way, session, **how):
    try:
        told = "a token" if session.fetch_token(url, **how)["access_token"] else "nothing"
    except Exception as failure:
        told = getattr(failure, "error", failure)
    print(f"{name} {version(name)}{way}:", told)

grant = {"grant_type": "client_credentials"}
attempt("Authlib", "", OAuth2Session("mailer", secret), **grant)
in_body = OAuth2Session("mailer", secret, token_endpoint_auth_method="client_secret_post")
attempt("Authlib", ", client_secret_post", in_body, **grant)
for way, how in ("", {}), (", include_client_id", {"include_client_id": True}):
    session = Session(client=BackendApplicationClient("mailer"))
    attempt("requests-oauthlib", way, session, client_id="mailer", client_secret=secret, **how)
EOF
cat >clients.mjs <<'EOF'
import {readFileSync} from 'node:fs';
import * as openid from 'openid-client';
import {ClientCredentials} from 'simple-oauth2';

const [url, id, secret] = [new URL(process.argv[2]), 'mailer', process.env.SECRET];
async function attempt(name, fetched) {
    const told = await fetched.then(token => (token.access_token ? 'a token' : 'nothing'), error => error.message);
    console.log(`${name} ${JSON.parse(readFileSync(`node_modules/${name}/package.json`)).version}: ${told}`);
}
const server = {issuer: url.origin, token_endpoint: url.href};
const configuration = new openid.Configuration(server, id, secret, openid.ClientSecretBasic(secret));
openid.allowInsecureRequests(configuration);
await attempt('openid-client', openid.clientCredentialsGrant(configuration, {}));
const simple = new ClientCredentials({client: {id, secret}, auth: {tokenHost: url.origin, tokenPath: url.pathname}});
await attempt('simple-oauth2', simple.getToken({}).then(({token}) => token));
EOF
port=$(free_port)
echo >log
start node server.mjs "$port"
until grep -q ready log; do
    kill -0 "$server" || cannot "$(cat log)"
    sleep 0.1
done
{ python3 clients.py "http://127.0.0.1:$port/token" && node clients.mjs "http://127.0.0.1:$port/token"; } >seen 2>error ||
    cannot "$(cat error)"
compare
