package bench

import (
	"io"
	"os"
	"testing"
)

// A VM goes where its data is, and its reads are served there; on a host without
// the data none is. The cluster is one of real processes.
func TestPlacementMakesReadsLocal(t *testing.T) {
	bin := os.Getenv("CAIRN_BIN")
	if bin == "" {
		t.Fatal("CAIRN_BIN names no cairn binary: run `make test-int`")
	}
	r := &PlaceResult{}
	if err := r.EndToEnd(t.Context(), PlaceConfig{Bin: bin, Reads: 500, Talk: io.Discard}); err != nil {
		t.Fatal(err)
	}
	t.Logf("local %+v, remote %+v, far %+v", r.Local, r.Remote, r.Far)
	if r.Local.LocalShare < 0.95 {
		t.Errorf("%.3f of the reads are local on %s, where the VM was placed", r.Local.LocalShare, r.Local.Host)
	}
	if r.Remote.LocalShare > 0 || r.Far.LocalShare > 0 || r.Remote.Host == r.Local.Host {
		t.Errorf("reads on a host without the data are local: %+v, %+v", r.Remote, r.Far)
	}
}
