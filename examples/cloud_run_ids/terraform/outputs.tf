output "registry" {
  description = "Where the images are pushed to, and what begins `definition.image` in jobs.yaml."
  value       = local.registry
}

output "storage" {
  description = "For DISPATCHER_STORAGE_URL."
  value       = "gs://${google_storage_bucket.dispatcher.name}"
}

output "data" {
  description = "Where the numbers go, under in/, and ids.txt."
  value       = "gs://${google_storage_bucket.data.name}"
}

output "worker" {
  description = "Whom the workers run as."
  value       = google_service_account.worker.email
}
