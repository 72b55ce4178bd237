package gateway

import (
	"testing"
	"time"
)

// Over any time the budget gives what it says, and one run more at most.
func TestCopyBudget(t *testing.T) {
	const rate, run = 10 << 20, 1 << 20
	b := &copyBudget{perSecond: rate}
	given, now := 0, time.Hour
	b.Take(now, 0)
	for range 10_000 {
		now += time.Millisecond
		for b.Take(now, run) {
			given += run
		}
	}
	if want := 10 * rate; given < want*95/100 || given > want+rate/10+2*run {
		t.Errorf("%d bytes in 10 s at %d per second", given, rate)
	}
}
