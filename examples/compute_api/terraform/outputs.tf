output "storage" {
  description = "For DISPATCHER_STORAGE_URL."
  value       = "gs://${google_storage_bucket.dispatcher.name}"
}

output "job" {
  description = "For options.job in cloud.yaml."
  value       = google_cloud_run_v2_job.count_primes.name
}

output "service_accounts" {
  description = "Whom the API's and the workers' services run as."
  value = {
    api    = google_service_account.api.email
    worker = google_service_account.worker.email
  }
}
