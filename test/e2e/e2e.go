// Package e2e tests the programs as they are installed: three daemons, a real
// broker, real guests, and the API at the end.
package e2e
