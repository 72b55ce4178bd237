package nbd

import (
	"strings"
	"testing"

	"github.com/cairnstore/cairn/proto/status"
)

func TestParseName(t *testing.T) {
	for s, want := range map[string]Name{
		"v": {Volume: "v"}, "db-1.old": {Volume: "db-1.old"}, "v@monday": {Volume: "v", Snapshot: "monday"},
	} {
		if got, err := ParseName(s); err != nil || got != want || got.String() != s {
			t.Errorf("%q: %+v, %v", s, got, err)
		}
	}
	for s, kind := range map[string]status.Kind{
		"": status.NotFound, "@": status.NotFound, "v@": status.NotFound, "@s": status.NotFound, "v@s@t": status.NotFound,
		strings.Repeat("x", MaxName+1): status.TooBig,
	} {
		if got, err := ParseName(s); status.Of(err) != kind {
			t.Errorf("%.20q: %+v, %v", s, got, err)
		}
	}
}
