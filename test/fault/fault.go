// Package fault runs the real programs, breaks something, and compares every
// sample that was sent with every sample that is stored.
package fault
