package kvm

import (
	"context"
	"testing"
)

func TestProbeGivesAnAnswerAndAReason(t *testing.T) {
	r := Probe(context.Background())
	t.Logf("usable %v: %s", r.Usable, r.Why)
	if r.Usable != (r.Why == "") {
		t.Errorf("usable %v with reason %q", r.Usable, r.Why)
	}
	// What it cannot do does not change, and nothing is used up by asking.
	for range 50 {
		if again := Probe(context.Background()); again != r {
			t.Fatalf("first %+v, then %+v", r, again)
		}
	}
}

func TestNoTimeToProbe(t *testing.T) {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if r := Probe(ctx); r.Usable || r.Why == "" {
		t.Errorf("%+v", r)
	}
}
