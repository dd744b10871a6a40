// Package tier kills notifiers that share a real RabbitMQ, and compares what
// comes out with what undisturbed ones give. By default it does so in short;
// `make test-tier` runs it at length.
package tier
