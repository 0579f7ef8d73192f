// npx openapi-typescript https://hooks.example.org/openapi.json --empty-objects-unknown --default-non-nullable=false -o receiver.d.ts
import createClient from "openapi-fetch";
import type { components, paths } from "./receiver";

/** Submit a prediction and wait for its end; with the same `order` it is never submitted twice. */
export async function draw(baseUrl: string, key: string, order: string, prompt: string) {
  const receiver = createClient<paths>({ baseUrl, headers: { Authorization: `Bearer ${key}` } });
  const submitted = await receiver.POST("/v1/predictions", {
    params: { header: { "Idempotency-Key": order, Prefer: "wait=30" } },
    body: { provider: "fal", model: "fal-ai/nano-banana", input: { prompt } },
  });
  if (!submitted.data) throw new Error(submitted.error.detail);
  let found: components["schemas"]["Prediction"] = submitted.data;
  while (!found.completed_at) {
    const params = { path: { id: found.id }, header: { Prefer: "wait=30" } };
    const read = await receiver.GET("/v1/predictions/{id}", { params });
    if (!read.data) throw new Error(read.error.detail);
    found = read.data;
  }
  return found.output?.map((output) => output.url) ?? [];
}
