variable "project" {
  description = "The Google Cloud project."
  type        = string
}

variable "region" {
  description = "Where the jobs run and the data lies: the target's `region`."
  type        = string
  default     = "asia-northeast1"
}

variable "keep_days" {
  description = "How long input documents and receipts are kept; longer than any batch may take."
  type        = number
  default     = 14
}
