package server

import (
	"sync"
	"time"

	"github.com/cairnstore/cairn/proto/pb"
)

// Lease lengths. A gateway may serve reads for leaseLength from the moment it
// sent a renewal that was granted; clockDrift is what two CLOCK_BOOTTIMEs may
// differ by over that long.
const (
	leaseLength = 8 * time.Second
	clockDrift  = 500 * time.Millisecond
)

// leases is what one leader knows about the right to serve reads. It lives in
// memory and for one term: nothing of an older term may be believed.
//
// Two rules of gateways make one row per volume enough. A gateway renews or
// releases an epoch only after its attach has returned; and it asks for a
// detach, or for an attach under its own session, only after it has stopped
// serving the volume. So a renewal of epoch e says that every epoch below e is
// over, because attach(e) has waited for them.
//
// Times are CLOCK_BOOTTIME, which every method takes as an argument.
type leases struct {
	length, drift time.Duration
	since         time.Duration // not before this leader's election

	mu   sync.Mutex // guards rows
	rows map[uint64]lease
}

// lease is the newest epoch of a volume this leader has heard of.
type lease struct {
	epoch uint32
	host  string
	until time.Duration // its reads end by then, but for drift; 0: released
	older time.Duration // by then the reads of all older epochs have ended, drift included
}

func newLeases(since, length, drift time.Duration) *leases {
	return &leases{length: length, drift: drift, since: since, rows: map[uint64]lease{}}
}

// quiet is when every lease granted by an earlier leader has ended.
func (l *leases) quiet() time.Duration { return l.since + l.length + l.drift }

// grant records that the epoch may serve reads; false if a newer one has been
// admitted. now is not before the renewal was sent. The caller has just found
// the epoch to be the current one. If an attach is committed meanwhile, either
// it has called attached, and the grant is refused, or it will, and waits for
// this grant.
func (l *leases) grant(volume uint64, epoch uint32, host string, now time.Duration) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	r, ok := l.rows[volume]
	if ok && r.epoch > epoch {
		return false
	}
	if !ok || r.epoch < epoch {
		r = lease{epoch: epoch}
	}
	r.host, r.until = host, max(r.until, now+l.length)
	l.rows[volume] = r
	return true
}

// release ends an epoch's lease at its holder's word.
func (l *leases) release(volume uint64, epoch uint32, host string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	r, ok := l.rows[volume]
	switch {
	case !ok || r.epoch < epoch:
		l.rows[volume] = lease{epoch: epoch, host: host}
	case r.epoch == epoch && r.host == host:
		r.until = 0
		l.rows[volume] = r
	}
}

// forget drops a volume that is gone.
func (l *leases) forget(volume uint64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.rows, volume)
}

// held says until when v's current epoch may still be serving, drift included;
// 0: it is not.
func (l *leases) held(v *pb.Volume, now time.Duration) time.Duration {
	l.mu.Lock()
	defer l.mu.Unlock()
	end := l.quiet()
	if r, ok := l.rows[v.Id]; ok && r.epoch >= v.Epoch {
		if r.until == 0 {
			return 0
		}
		end = r.until + l.drift
	}
	if end <= now {
		return 0
	}
	return end
}

// clear says when the reads of every epoch older than v's have ended. v is the
// state as it is, its holder included.
func (l *leases) clear(v *pb.Volume) time.Duration {
	l.mu.Lock()
	defer l.mu.Unlock()
	r, ok := l.rows[v.Id]
	switch {
	case v.Epoch <= 1 || !v.Moved:
		return 0
	case ok && r.epoch >= v.Epoch:
		return r.older
	}
	return l.after(r, ok, "")
}

// after is when every epoch up to row r's has ended; without a row nothing is
// known of them but that earlier leaders' grants end. A row needs no such doubt:
// its epoch was seen in the state during this term, so every later epoch began
// in this term, and its attach has made a row or was never answered. goneHost
// is one all of whose older sessions are known to be dead.
func (l *leases) after(r lease, ok bool, goneHost string) time.Duration {
	switch {
	case !ok:
		return l.quiet()
	case r.until == 0 || goneHost != "" && r.host == goneHost:
		return r.older
	}
	return max(r.older, r.until+l.drift)
}

// attached records a committed attach and says when it may be answered: when
// the reads of all older epochs have ended. v is the attach's result: as long
// as it has not moved, every epoch since the last detach was ended by proof, and
// those before by the detach. prev is the volume as it was read before the
// commit, and gone that the caller's older sessions on its own host are dead;
// they count only if nothing came between.
func (l *leases) attached(v, prev *pb.Volume, gone bool, now time.Duration) time.Duration {
	l.mu.Lock()
	defer l.mu.Unlock()
	r, ok := l.rows[v.Id]
	if ok && r.epoch >= v.Epoch {
		return r.older // asked again, or overtaken by another
	}
	var end time.Duration
	switch direct := prev != nil && prev.Epoch+1 == v.Epoch && prev.HolderHost == v.HolderHost; {
	case !v.Moved:
	case gone && direct:
		end = l.after(r, ok, v.HolderHost)
	default:
		end = l.after(r, ok, "")
	}
	l.rows[v.Id] = lease{epoch: v.Epoch, host: v.HolderHost, until: max(now, end) + l.length, older: end}
	return end
}

// handed records a committed hand-over. Its old holder had an answered attach,
// so that all older epochs had ended, and says that it serves no more itself:
// there is nothing to wait for.
func (l *leases) handed(v *pb.Volume, now time.Duration) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if r, ok := l.rows[v.Id]; !ok || r.epoch < v.Epoch {
		l.rows[v.Id] = lease{epoch: v.Epoch, host: v.HolderHost, until: now + l.length}
	}
}
