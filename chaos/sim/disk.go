package sim

import (
	"syscall"
	"time"

	"github.com/cairnstore/cairn/chunk/disk"
	"github.com/cairnstore/cairn/proto/status"
)

// faultyDisk is a crashable disk whose operations take time and may go wrong.
// Writes, syncs, discards and reads are lanes of their own, each in order, as
// chunk/disk.File has them.
type faultyDisk struct {
	w    *world
	node *node
	mem  *disk.Mem
	life int  // of the process that uses it: completions of an earlier one are lost
	now  bool // opening and closing: operations complete at once

	lanes     [disk.Allocate + 1]time.Duration // busy until
	pending   []*disk.Op                       // submitted and not completed, in order; bounded by the store
	hungUntil time.Duration
	slow      time.Duration // each operation takes so much longer
	immediate bool          // reads are served from memory
	failNext  bool          // the next write or sync fails with EIO
	failFor   time.Duration // after that its process is started again
	rot       Kind          // what happens to the next write; "": nothing
}

var (
	_ disk.Disk      = (*faultyDisk)(nil)
	_ disk.Immediate = (*faultyDisk)(nil)
)

// Size implements disk.Disk.
func (d *faultyDisk) Size() int64 { return d.mem.Size() }

// Close implements disk.Disk.
func (d *faultyDisk) Close() error { return nil }

// ReadNow implements disk.Immediate.
func (d *faultyDisk) ReadNow(b []byte, off int64) bool {
	return (d.now || d.immediate && d.hungUntil <= d.w.now && d.slow == 0) && d.mem.ReadNow(b, off)
}

// Submit implements disk.Disk. A sync takes effect when it is submitted or when
// it completes: what is written meanwhile may or may not be covered.
func (d *faultyDisk) Submit(op *disk.Op) {
	if d.now {
		d.mem.Submit(op)
		return
	}
	if op.Kind == disk.Sync && d.w.chance(2) && !d.failNext {
		d.apply(&disk.Op{Kind: disk.Sync})
	}
	d.pending = append(d.pending, op)
	lane := &d.lanes[op.Kind]
	*lane = max(*lane, d.w.now, d.hungUntil) + d.latency(op.Kind)
	d.complete(op, d.life, *lane-d.w.now)
}

func (d *faultyDisk) latency(k disk.Kind) time.Duration {
	lo, hi := 15*time.Microsecond, 60*time.Microsecond
	if k == disk.Sync {
		lo, hi = 100*time.Microsecond, 2*time.Millisecond
	}
	return d.w.span(lo, hi) + d.slow
}

// complete ends op after a while, later if the disk hangs by then.
func (d *faultyDisk) complete(op *disk.Op, life int, in time.Duration) {
	d.w.after(in, func() {
		if d.life != life {
			return
		}
		if late := max(d.hungUntil, d.node.pausedUntil); late > d.w.now {
			d.complete(op, life, late-d.w.now+time.Microsecond)
			return
		}
		for i, o := range d.pending {
			if o == op {
				d.pending = append(d.pending[:i], d.pending[i+1:]...)
				break
			}
		}
		op.Done(d.finish(op))
	})
}

// finish lets op take effect, or goes wrong.
func (d *faultyDisk) finish(op *disk.Op) error {
	if d.failNext && (op.Kind == disk.Write || op.Kind == disk.Sync) {
		d.failNext = false
		d.node.failedUntil = d.w.now + d.failFor + time.Millisecond
		d.w.faults.failedUntil = max(d.w.faults.failedUntil, d.node.failedUntil)
		d.w.after(d.failFor, func() { d.w.faults.replace(d.node) })
		d.w.note(d.node.name, "disk error", func() string { return "a write or sync fails" })
		return status.Errorf(status.IO, "the disk failed: %w", syscall.EIO)
	}
	if op.Kind == disk.Write && d.rot != "" {
		kind := d.rot
		d.rot = ""
		return d.rotten(op, kind)
	}
	return d.apply(op)
}

// rotten is a write the disk answers OK and does wrong.
func (d *faultyDisk) rotten(op *disk.Op, kind Kind) error {
	d.node.rots = true
	d.w.note(d.node.name, string(kind), func() string { return "a write is answered and not done right" }, uint64(op.Off))
	if kind == LostWrite {
		return nil
	}
	wrong := *op
	blocks := d.mem.Size() / 4096
	wrong.Off = min((int64(d.w.rng.Int64N(blocks-16))+16)*4096, d.mem.Size()-length(op))
	return d.apply(&wrong)
}

func length(op *disk.Op) int64 {
	n := op.Len
	for _, b := range op.Bufs {
		n += int64(len(b))
	}
	return n
}

// apply does op on the bytes.
func (d *faultyDisk) apply(op *disk.Op) (err error) {
	o := *op
	o.Done = func(e error) { err = e }
	d.mem.Submit(&o)
	return err
}

// crash ends the process that uses the disk: what was under way has happened, in
// part, or not at all. keep is how much of the unsynced sectors a power loss
// leaves, in percent; 100 is the end of the process alone.
func (d *faultyDisk) crash(keep int) {
	for _, op := range d.pending {
		switch {
		case op.Kind == disk.Read || d.w.chance(3):
		case op.Kind == disk.Write && d.w.chance(2):
			d.tear(op)
		default:
			// An error here is the disk's own, and nobody is left to hear it.
			if err := d.apply(op); err != nil {
				d.w.violate("sim", "a pending disk operation at %d cannot be done: %v", op.Off, err)
			}
		}
	}
	d.pending, d.lanes, d.failNext, d.rot = nil, [disk.Allocate + 1]time.Duration{}, false, ""
	d.life++
	if keep < 100 {
		d.mem.PowerLoss(d.w.rng.Uint64(), keep)
	}
}

// tear does the first sectors of a write only.
func (d *faultyDisk) tear(op *disk.Op) {
	left := d.w.rng.Int64N(length(op)/disk.SectorBytes+1) * disk.SectorBytes
	part := &disk.Op{Kind: disk.Write, Off: op.Off}
	for _, b := range op.Bufs {
		n := min(left, int64(len(b)))
		part.Bufs = append(part.Bufs, b[:n])
		left -= n
	}
	if err := d.apply(part); err != nil {
		d.w.violate("sim", "a torn disk write at %d cannot be done: %v", op.Off, err)
	}
}
