// Package overhead measures what kvmeter costs the host it meters.
package overhead
