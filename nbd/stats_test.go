package nbd

import (
	"testing"
	"time"

	"github.com/cairnstore/cairn/proto/status"
)

func TestHistogramBuckets(t *testing.T) {
	last := -1
	for us := uint64(0); us < 1<<12; us++ {
		var h Histogram
		h.Add(time.Duration(us) * time.Microsecond)
		at := -1
		for i, c := range h.Counts {
			if c > 0 {
				at = i
			}
		}
		bound := BucketMaxUs(at)
		if at < last || at > last+1 || bound < us || float64(bound) > 1.25*float64(us) {
			t.Fatalf("%d µs fell into bucket %d after %d, whose bound is %d", us, at, last, bound)
		}
		last = at
	}
	var h Histogram
	for _, d := range []time.Duration{-time.Second, 1<<30*time.Microsecond - 1, 1 << 30 * time.Microsecond, time.Duration(1<<63 - 1)} {
		h.Add(d)
	}
	if h.Counts[0] != 1 || h.Counts[Buckets-1] != 3 {
		t.Errorf("the ends: %d and %d", h.Counts[0], h.Counts[Buckets-1])
	}
}

func TestQuantiles(t *testing.T) {
	var h Histogram
	if h.QuantileUs(0.5) != 0 {
		t.Error("the median of nothing")
	}
	for i := 1; i <= 1000; i++ {
		h.Add(time.Duration(i) * time.Microsecond)
	}
	for q, want := range map[float64]uint64{0.5: 500, 0.99: 990, 1: 1000} {
		if got := h.QuantileUs(q); got < want || float64(got) > 1.25*float64(want) {
			t.Errorf("quantile %v is %d, want %d", q, got, want)
		}
	}
	var a, b Stats
	a.Note(CmdRead, 4096, 5*time.Microsecond, false)
	b.Note(CmdRead, 4096, 9*time.Microsecond, true)
	b.Note(77, 0, time.Microsecond, true)
	a.Erred(status.IO, 3)
	b.Erred(status.NoSpace, 7)
	b.Erred(status.NoSpace, 5)
	b.Erred(status.OK, 6)
	b.Erred(status.Shutdown, 6)
	a.Merge(&b)
	if a.Merge(&Stats{}); a.Errors != 3 || a.ErrorAt != 5 || a.Error != status.NoSpace {
		t.Errorf("errors: %d, the last %v at %v", a.Errors, a.Error, a.ErrorAt)
	}
	if o := a.Ops[ClassRead]; o.Done != 2 || o.Failed != 1 || o.Bytes != 4096 || o.Latency.Count() != 2 || o.Latency.MaxUs != 9 || o.Latency.SumUs != 14 {
		t.Errorf("%+v", o)
	}
	if a.Ops[ClassOther].Done != 1 || a.Ops[ClassOther].Bytes != 0 {
		t.Errorf("%+v", a.Ops[ClassOther])
	}
}
