package local

import (
	"fmt"
)

// KindStats says what records of one kind take.
type KindStats struct {
	Kind               string
	Records            int64
	KeyBytes, RawBytes int64 // before compression
	DiskBytes          int64 // after, as far as flushed and about
}

// Stats says what a store holds.
type Stats struct {
	Kinds                                                     []KindStats
	Meters, Nodes, Resources, Holders, Metadata, PendingHours int
	Hours                                                     int   // that have samples
	DiskBytes                                                 int64 // of Pebble, log and all
}

// kindNames are the kinds of records by the first byte of their key.
var kindNames = []struct {
	kind byte
	name string
}{
	{keyWAL, "received batches"},
	{keyChunk, "chunks"},
	{keyRows, "rows"},
	{keyRollup, "rollups"},
	{keyDay, "rollups of days"},
	{keyBatch, "batches"},
	{keyBatchID, "batch ids"},
	{keyForeign, "foreign ids"},
	{keySeqs, "sequence numbers"},
	{keyResource, "resources"},
	{keyPending, "hours to roll up"},
	{keyMetered, "nodes"},
	{keyEvent, "events"},
	{keyEventID, "event ids"},
	{keyEventTerm, "event index"},
	{keyEventType, "event types"},
}

// Stats counts what the store holds. It reads all of it.
func (s *Store) Stats() (Stats, error) {
	if err := s.enter(); err != nil {
		return Stats{}, err
	}
	defer s.readers.Done()
	var out Stats
	for _, k := range kindNames {
		st := KindStats{Kind: k.name}
		if err := s.scan([]byte{k.kind}, []byte{k.kind + 1}, func(k, v []byte) error {
			st.Records++
			st.KeyBytes += int64(len(k))
			st.RawBytes += int64(len(v))
			return nil
		}); err != nil {
			return out, fmt.Errorf("count %s: %w", k.name, err)
		}
		n, err := s.db.EstimateDiskUsage([]byte{k.kind}, []byte{k.kind + 1})
		if err != nil {
			return out, fmt.Errorf("count %s: %w", k.name, err)
		}
		st.DiskBytes = int64(n)
		out.Kinds = append(out.Kinds, st)
	}
	s.mu.RLock()
	defer s.mu.RUnlock()
	d := s.catalogue.dimensions()
	out.Meters, out.Nodes, out.Resources, out.Holders, out.Metadata = len(d.meters), len(d.nodes), len(d.resources), len(d.holders), len(d.metas)-1
	out.Hours, out.PendingHours = len(s.hours), len(s.pending)
	out.DiskBytes = int64(s.db.Metrics().DiskSpaceUsage())
	return out, nil
}
