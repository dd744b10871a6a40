// Package manual writes what a package of a program has beside it: manual pages
// and the completion of shells. Programs that are built with the tag manual do
// that and nothing else, so that those that are installed don't carry it.
package manual
