variable "project" {
  description = "The Google Cloud project."
  type        = string
}

variable "region" {
  description = "Where computations run, and where their results lie."
  type        = string
  default     = "europe-west1"
}

variable "image" {
  description = "The image of image/Dockerfile, with its digest: REGION-docker.pkg.dev/…/count-primes@sha256:…"
  type        = string
}

variable "keep_days" {
  description = "How long input documents and results are kept; longer than any computation may take."
  type        = number
  default     = 14
}
