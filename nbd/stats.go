package nbd

import (
	"math/bits"
	"time"

	"github.com/cairnstore/cairn/proto/status"
)

// OpClass sorts commands for statistics.
type OpClass uint8

// The classes, in the order they are shown.
const (
	ClassRead OpClass = iota
	ClassWrite
	ClassFlush
	ClassTrim
	ClassZero
	ClassCache
	ClassStatus
	ClassOther // unknown commands, which are refused
	ClassCount
)

// String returns the class's name.
func (c OpClass) String() string {
	return [...]string{"read", "write", "flush", "trim", "zero", "cache", "block-status", "other"}[c]
}

// ClassOf returns the class of a command.
func ClassOf(cmd uint16) OpClass {
	switch cmd {
	case CmdRead:
		return ClassRead
	case CmdWrite:
		return ClassWrite
	case CmdFlush:
		return ClassFlush
	case CmdTrim:
		return ClassTrim
	case CmdWriteZeroes:
		return ClassZero
	case CmdCache:
		return ClassCache
	case CmdBlockStatus:
		return ClassStatus
	}
	return ClassOther
}

// Buckets of a Histogram: four to an octave, so that a bound is at most a
// quarter above any value in its bucket.
//
//	0 1 2 3 | 4 5 6 7 | 8-9 10-11 12-13 14-15 | 16-19 …    µs
const (
	Buckets   = 4 * 29 // the last one also holds all above 2^30 µs, 18 minutes
	octaveMax = 30
)

// Histogram counts durations. The zero value is empty.
type Histogram struct {
	Counts [Buckets]uint64
	SumUs  uint64
	MaxUs  uint64
}

// Add counts one duration.
func (h *Histogram) Add(d time.Duration) {
	us := uint64(max(d.Microseconds(), 0))
	h.SumUs += us
	h.MaxUs = max(h.MaxUs, us)
	if us < 4 {
		h.Counts[us]++
		return
	}
	octave := bits.Len64(us) - 1 // ≥ 2
	if octave >= octaveMax {
		h.Counts[Buckets-1]++
		return
	}
	h.Counts[4*(octave-1)+int(us>>(octave-2)&3)]++
}

// BucketMaxUs is the largest value a bucket holds, in µs.
func BucketMaxUs(i int) uint64 {
	if i < 4 {
		return uint64(i)
	}
	octave, quarter := i/4+1, uint64(i%4)
	return 1<<octave + (quarter+1)<<(octave-2) - 1
}

// Count is how many durations were added.
func (h *Histogram) Count() uint64 {
	n := uint64(0)
	for _, c := range h.Counts {
		n += c
	}
	return n
}

// QuantileUs returns an upper bound of the q-quantile, 0 < q ≤ 1, in µs; 0 of
// an empty histogram.
func (h *Histogram) QuantileUs(q float64) uint64 {
	want := uint64(q * float64(h.Count()))
	seen := uint64(0)
	for i, c := range h.Counts {
		if seen += c; seen > 0 && seen >= want {
			return min(BucketMaxUs(i), h.MaxUs)
		}
	}
	return h.MaxUs
}

// OpStats is what one class of commands has come to.
type OpStats struct {
	Done    uint64 // answered, failures included
	Failed  uint64
	Bytes   uint64    // of the successful ones
	Latency Histogram // from a request's arrival to its reply
}

// Stats is what an export, or one connection to it, has done.
type Stats struct {
	Ops     [ClassCount]OpStats
	Errors  uint64        // requests that the volume, not the door, answered with an error
	ErrorAt time.Duration // the last of them, by the server's clock
	Error   status.Kind   // and what it was
}

// Erred notes that the volume answered a request with an error, unless that is only
// its end.
func (s *Stats) Erred(kind status.Kind, now time.Duration) {
	switch kind {
	case status.OK, status.Shutdown, status.Fenced, status.Permission:
		return
	}
	s.Errors, s.ErrorAt, s.Error = s.Errors+1, now, kind
}

// Note counts one answered request.
func (s *Stats) Note(cmd uint16, n uint32, latency time.Duration, failed bool) {
	o := &s.Ops[ClassOf(cmd)]
	o.Done++
	if failed {
		o.Failed++
	} else {
		o.Bytes += uint64(n)
	}
	o.Latency.Add(latency)
}

// Merge adds another's counts; nil has none.
func (s *Stats) Merge(o *Stats) {
	if o == nil {
		return
	}
	if s.Errors += o.Errors; o.Errors > 0 && o.ErrorAt >= s.ErrorAt {
		s.ErrorAt, s.Error = o.ErrorAt, o.Error
	}
	for i := range s.Ops {
		a, b := &s.Ops[i], &o.Ops[i]
		a.Done += b.Done
		a.Failed += b.Failed
		a.Bytes += b.Bytes
		a.Latency.SumUs += b.Latency.SumUs
		a.Latency.MaxUs = max(a.Latency.MaxUs, b.Latency.MaxUs)
		for k := range a.Latency.Counts {
			a.Latency.Counts[k] += b.Latency.Counts[k]
		}
	}
}
