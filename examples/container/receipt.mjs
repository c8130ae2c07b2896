// The container's part in Node.js 18 or newer, without packages: copy this file into the image.
//
//     import { run } from "./receipt.mjs";
//
//     await run(async (item) => {
//       return await convert(item);        // the item's output; throwing makes it failed
//     });
//
// It speaks the protocol of docs/container.md over file://, gs:// (as the platform's own account)
// and signed URLs. For s3:// put PutObject with IfNoneMatch "*" of @aws-sdk/client-s3 in `send`.

import { randomUUID } from "node:crypto";
import { link, mkdir, readFile, rename, rm, writeFile } from "node:fs/promises";
import { hostname } from "node:os";
import { dirname } from "node:path";
import { fileURLToPath } from "node:url";

const CLAIMED_BY_ANOTHER = 94;
const MAX_OUTPUT_BYTES = 4096;
const PROGRESS_MS = 5000;
const env = process.env;

const shown = (uri) => uri.split("?")[0]; // a signed URL is a secret

export const taskIndex = () =>
  Number(
    env.DISPATCH_TASK_INDEX ??
      env.CLOUD_RUN_TASK_INDEX ??
      env.AWS_BATCH_JOB_ARRAY_INDEX ??
      env.JOB_COMPLETION_INDEX ??
      0,
  );

async function googleToken() {
  const host = env.GCE_METADATA_HOST || "metadata.google.internal";
  const url = `http://${host}/computeMetadata/v1/instance/service-accounts/default/token`;
  const answer = await fetch(url, { headers: { "Metadata-Flavor": "Google" } });
  return (await answer.json()).access_token;
}

// One call, until its answer is clear: null if it is not there (GET) or there already (onlyNew).
async function send(method, uri, body, onlyNew) {
  for (let pause = 300; ; pause *= 3) {
    let problem;
    try {
      const headers = body === undefined ? {} : { "Content-Type": "application/json" };
      let url = uri;
      let verb = method;
      if (uri.startsWith("gs://")) {
        const [, bucket, key] = /^gs:\/\/([^/]+)\/(.+)$/.exec(uri);
        const emulator = env.STORAGE_EMULATOR_HOST?.replace(/^(?!.*:\/\/)/, "http://");
        const base = emulator ?? "https://storage.googleapis.com";
        if (!emulator) headers.Authorization = `Bearer ${await googleToken()}`;
        const name = encodeURIComponent(key);
        url = `${base}/storage/v1/b/${bucket}/o/${name}?alt=media`;
        if (method === "PUT") {
          verb = "POST";
          url = `${base}/upload/storage/v1/b/${bucket}/o?uploadType=media&name=${name}`;
          if (onlyNew) url += "&ifGenerationMatch=0";
        }
      } else if (onlyNew) {
        headers["If-None-Match"] = "*";
      }
      const signal = AbortSignal.timeout(20_000);
      const answer = await fetch(url, { method: verb, headers, body, signal });
      const text = await answer.text();
      if (answer.ok) return text;
      if (method === "GET" && answer.status === 404) return null;
      if (onlyNew && answer.status === 412) return null;
      problem = `${answer.status} ${text.slice(0, 400)}`;
      if (answer.status < 500 && ![408, 409, 429].includes(answer.status)) pause = Infinity;
    } catch (error) {
      problem = error.cause?.message ?? error.message;
    }
    if (pause > 3000) throw new Error(`cannot ${method} ${shown(uri)}: ${problem}`);
    await new Promise((resolve) => setTimeout(resolve, pause));
  }
}

async function read(uri) {
  if (!uri.startsWith("file://")) return await send("GET", uri);
  try {
    return await readFile(fileURLToPath(uri), "utf8");
  } catch (error) {
    if (error.code === "ENOENT") return null;
    throw error;
  }
}

async function write(uri, text, onlyNew) {
  if (!uri.startsWith("file://")) return (await send("PUT", uri, text, onlyNew)) !== null;
  const path = fileURLToPath(uri);
  const draft = `${path}.${randomUUID()}.draft`;
  await mkdir(dirname(path), { recursive: true });
  await writeFile(draft, text, { flag: "wx" });
  try {
    // A link is made whole or not at all, and never over another file.
    await (onlyNew ? link(draft, path) : rename(draft, path));
  } catch (error) {
    if (error.code === "EEXIST") return false;
    throw error;
  } finally {
    await rm(draft, { force: true });
  }
  return true;
}

async function claim() {
  const uri = env.DISPATCH_CLAIM_URI;
  if (!uri) return;
  const own = env.CLOUD_RUN_EXECUTION || env.AWS_BATCH_JOB_ID?.split(":")[0] || hostname();
  if (await write(uri, own, true)) return;
  const other = (await read(uri))?.trim();
  if (other === own) return;
  console.error(`${uri} belongs to execution ${other}, and this is ${own}: nothing is done here`);
  process.exit(CLAIMED_BY_ANOTHER);
}

// This task's line of the input: {items, chunk, attempt, …}.
async function input() {
  let text = env.DISPATCH_ITEMS || env.DISPATCH_INPUT;
  if (!text && env.DISPATCH_INPUT_URI) text = await read(env.DISPATCH_INPUT_URI);
  if (!text) throw new Error("there is no input: DISPATCH_ITEMS, DISPATCH_INPUT(_URI)");
  if (text.trimStart().startsWith("[")) return { items: JSON.parse(text) };
  const line = text.split("\n")[taskIndex()];
  if (!line) throw new Error(`the input has no line for task ${taskIndex()}`);
  return JSON.parse(line);
}

/** Work on every item of this task, one after the other, and write the receipt. */
export async function run(work) {
  await claim();
  const line = await input();
  const done = [];
  let uri = line.result_uri ?? env.DISPATCH_RESULT_URI;
  if (uri?.endsWith("/")) uri += `${taskIndex()}.json`;
  const mayReplace = uri && !/^https?:/.test(uri);
  const stem = uri?.replace(/\.json$/, "");

  const receipt = (complete) =>
    JSON.stringify({
      version: 1,
      key: env.DISPATCH_KEY ?? null,
      task: taskIndex(),
      chunk: line.chunk ?? (env.DISPATCH_CHUNK ? Number(env.DISPATCH_CHUNK) : null),
      attempt: line.attempt ?? Number(env.DISPATCH_ATTEMPT ?? 1),
      complete,
      items: done,
      written_at: new Date().toISOString(),
    });
  const keep = async () => {
    if (mayReplace) await write(`${stem}.progress.json`, receipt(false), false);
  };

  process.once("SIGTERM", async () => {
    try {
      await keep();
    } finally {
      process.exit(143);
    }
  });
  const timer = setInterval(() => keep().catch((e) => console.error(e.message)), PROGRESS_MS);

  try {
    for (const [i, item] of line.items.entries()) {
      try {
        const output = await work(item, i);
        const text = JSON.stringify(output);
        if (text === undefined || text === "null") {
          done.push({ i, ok: true });
        } else if (Buffer.byteLength(text) <= MAX_OUTPUT_BYTES) {
          done.push({ i, ok: true, output: JSON.parse(text) });
        } else if (mayReplace) {
          await write(`${stem}.output.${i}.json`, text, false);
          done.push({ i, ok: true, output_uri: `${stem}.output.${i}.json` });
        } else {
          throw new Error(`the output has more than ${MAX_OUTPUT_BYTES} bytes`);
        }
      } catch (error) {
        const words = String(error).slice(0, 1000);
        done.push({ i, ok: false, error: words.toWellFormed?.() ?? words });
      }
    }
    clearInterval(timer);
    if (uri && !(await write(uri, receipt(true), true))) {
      console.error(`there is a receipt at ${shown(uri)} already; it stands`);
    }
  } finally {
    clearInterval(timer);
  }
  // Without a receipt the exit code is all that tells.
  if (done.some((entry) => !entry.ok)) process.exitCode = 1;
}
