package server

import (
	"time"

	"github.com/cairnstore/cairn/proto/pb"
)

// LeaseTable is a leader's table of leases by itself, for chaos/sim, which
// drives this one instead of a second implementation. Its methods are those
// that the calls of a Server use; times are CLOCK_BOOTTIME.
type LeaseTable struct{ l *leases }

// NewLeaseTable returns the table of a leader elected at since.
func NewLeaseTable(since time.Duration) LeaseTable {
	return LeaseTable{newLeases(since, leaseLength, clockDrift)}
}

// Length is how long a grant is good for, from when it was asked for.
func (t LeaseTable) Length() time.Duration { return t.l.length }

// Grant lets an epoch serve reads; false if a newer one has been admitted.
func (t LeaseTable) Grant(volume uint64, epoch uint32, host string, now time.Duration) bool {
	return t.l.grant(volume, epoch, host, now)
}

// Held says until when v's epoch may be serving; 0: it is not.
func (t LeaseTable) Held(v *pb.Volume, now time.Duration) time.Duration { return t.l.held(v, now) }

// Clear says when the reads of every epoch older than v's have ended.
func (t LeaseTable) Clear(v *pb.Volume) time.Duration { return t.l.clear(v) }

// Attached records a committed attach and says when it may be answered.
func (t LeaseTable) Attached(v, prev *pb.Volume, gone bool, now time.Duration) time.Duration {
	return t.l.attached(v, prev, gone, now)
}

// Handed records a committed hand-over.
func (t LeaseTable) Handed(v *pb.Volume, now time.Duration) { t.l.handed(v, now) }
