variable "project" {
  description = "The Google Cloud project."
  type        = string
}

variable "region" {
  description = "Where the containers run: the target's `region`."
  type        = string
  default     = "europe-west1"
}

variable "location" {
  description = "Where the exports lie. BigQuery extracts into a bucket in the dataset's own location, such as EU or europe-west1."
  type        = string
  default     = "europe-west1"
}

variable "dataset" {
  description = "The dataset that is exported, by its name alone."
  type        = string
  default     = "shop"
}

variable "image" {
  description = "The image of image/Dockerfile, with its digest: REGION-docker.pkg.dev/…/bigquery-export@sha256:…"
  type        = string
}

variable "keep_days" {
  description = "How long input documents and receipts are kept; longer than any batch may take."
  type        = number
  default     = 14
}
