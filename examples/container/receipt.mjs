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
const MAX_STORED_OUTPUT_BYTES = 16 << 20;
const MAX_ERROR_LENGTH = 1000;
const MAX_RECEIPT_BYTES = 16 << 20;
const PROGRESS_MS = 5000;
const env = process.env;

const shown = (uri) => uri.split("?")[0]; // a signed URL is a secret

// The bytes of a value in the receipt. The dispatcher spells 1e-7 as 1e-07.
const size = (value) => Buffer.byteLength(JSON.stringify(value).replace(/e-(\d)(?!\d)/g, "e-0$1"));

/** Which task of its execution this is, from 0; a variable that is empty says nothing. */
export function taskIndex() {
  for (const name of [
    "DISPATCH_TASK_INDEX",
    "CLOUD_RUN_TASK_INDEX",
    "AWS_BATCH_JOB_ARRAY_INDEX",
    "JOB_COMPLETION_INDEX",
  ]) {
    if (!env[name]) continue;
    if (/^[0-9]{1,9}$/.test(env[name])) return Number(env[name]);
    throw new Error(`${name} is ${JSON.stringify(env[name])}, and must be a number`);
  }
  return 0;
}

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
          headers["Content-Type"] = "application/octet-stream";
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
  if (other === undefined) throw new Error(`the claim ${uri} was there and is not`);
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
  let uri = line.result_uri || env.DISPATCH_RESULT_URI;
  if (uri?.endsWith("/")) uri += `${taskIndex()}.json`;
  const mayReplace = uri && !/^https?:/.test(uri);
  const stem = uri?.replace(/\.json$/, "");

  const receipt = (complete) =>
    JSON.stringify({
      version: 1,
      key: env.DISPATCH_KEY ?? null,
      task: taskIndex(),
      chunk: line.chunk ?? (env.DISPATCH_CHUNK ? Number(env.DISPATCH_CHUNK) : null),
      attempt: line.attempt ?? Number(env.DISPATCH_ATTEMPT || 1),
      complete,
      items: done,
      written_at: new Date().toISOString(),
    });
  // What is written last must be what was made last; but after a SIGTERM there are seconds only.
  let writing = Promise.resolve();
  const replace = () => mayReplace && write(`${stem}.progress.json`, receipt(false), false);
  const keep = () => {
    const patience = new Promise((end) => setTimeout(end, 3000).unref());
    writing = Promise.race([writing.catch(() => {}), patience]).then(replace);
    return writing;
  };

  // Each item has the same room, so that the receipt tells of every one. What does not fit goes
  // beside it, or is cut.
  const count = line.items.length;
  const room = Math.floor((MAX_RECEIPT_BYTES - Buffer.byteLength(receipt(false))) / count) - 1;
  if (uri && count && room < size({ i: count - 1, ok: false })) {
    throw new Error(`no receipt can tell of ${count} items: make the job's chunks smaller`);
  }
  const succeeded = async (i, output) => {
    const text = JSON.stringify(output);
    if (text === undefined || text === "null") return { i, ok: true };
    const whole = { i, ok: true, output: JSON.parse(text) };
    if (!uri || (size(whole.output) <= MAX_OUTPUT_BYTES && size(whole) <= room)) return whole;
    const entry = { i, ok: true, output_uri: `${stem}.output.${i}.json` };
    if (!mayReplace || Buffer.byteLength(text) > MAX_STORED_OUTPUT_BYTES || size(entry) > room) {
      throw new Error(`the output has ${Buffer.byteLength(text)} bytes, for which there is no room`);
    }
    await write(entry.output_uri, text, false);
    return entry;
  };
  const failed = (i, thrown) => {
    let words;
    try {
      words = String(thrown);
    } catch {
      words = "it threw what is no text";
    }
    const letters = Array.from(words.slice(0, 2 * MAX_ERROR_LENGTH + 2)); // none of them in halves
    for (let most = MAX_ERROR_LENGTH; most > 0; most = Math.floor(most * 0.9)) {
      const cut = letters.length > most ? [...letters.slice(0, most - 1), "…"] : letters;
      const entry = { i, ok: false, error: cut.join("") };
      if (!uri || size(entry) <= room) return entry;
    }
    return { i, ok: false };
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
        done.push(await succeeded(i, await work(item, i)));
      } catch (error) {
        done.push(failed(i, error));
        // Without a receipt, the log is all that tells which.
        if (!uri) console.error(`item ${i}: ${done.at(-1).error ?? "failed"}`);
      }
    }
    clearInterval(timer);
    if (uri && !(await write(uri, receipt(true), true))) {
      console.error(`there is a receipt at ${shown(uri)} already; it stands`);
    }
  } catch (error) {
    await keep().catch((e) => console.error(e.message));
    throw error;
  } finally {
    clearInterval(timer);
  }
  // Without a receipt the exit code is all that tells.
  if (done.some((entry) => !entry.ok)) process.exitCode = 1;
}
