package store

import (
	"github.com/cairnstore/cairn/proto/ids"
	"github.com/cairnstore/cairn/proto/status"
)

// Position is how far a store's log has come. Between two openings it only
// rises: a file that has less is an older copy of itself.
type Position struct {
	Life      uint32 // counts the openings; in the log before anything is answered
	Recovered uint64 // highest LSN the last opening found
	Durable   uint64 // highest LSN that survives a power loss
	Written   uint64 // and a kill; Durable ≤ Written
}

// Position tells how far the log has come.
func (s *Store) Position() Position {
	s.mu.Lock()
	defer s.mu.Unlock()
	return Position{Life: s.life, Recovered: s.recovered, Durable: s.durable, Written: s.written}
}

// Renew gives the store another incarnation, above the one it has and above
// known, durably: whatever it holds has to be compared with its peers before it
// counts. It is for a store that may be an older copy of itself, before it
// serves.
func (s *Store) Renew(known ids.Incarnation) error {
	var out outbox
	done := false
	s.mu.Lock()
	if s.failed != nil || s.closed {
		defer s.mu.Unlock()
		return status.Errorf(status.Unavailable, "the store cannot take a new incarnation: it has stopped")
	}
	s.incarnation = max(s.incarnation, known) + 1
	for _, v := range s.vols {
		v.intact = false
	}
	if err := s.newSegment(); err != nil {
		s.fail(err, &out)
	}
	s.syncs = append(s.syncs, syncWait{lsn: s.lsn, then: func(*outbox) { done = true }})
	s.pump(&out)
	s.unlock(&out)
	s.mu.Lock()
	defer s.mu.Unlock()
	for s.failed == nil && !done {
		s.cond.Wait()
	}
	return s.failed
}
