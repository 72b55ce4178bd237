package kvm

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestProbeGivesAnAnswerAndAReason(t *testing.T) {
	r := Probe(context.Background())
	t.Logf("usable %v: %s", r.Usable, r.Why)
	if r.Usable != (r.Why == "") {
		t.Errorf("usable %v with reason %q", r.Usable, r.Why)
	}
}
func TestNoDevice(t *testing.T) {
	dir := t.TempDir()
	plain := filepath.Join(dir, "plain")
	if err := os.WriteFile(plain, []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct{ dev, want string }{
		{filepath.Join(dir, "none"), "there is no"},
		{plain, "is no KVM device"},
		{"/dev/null", "is no KVM device"},
	} {
		if r := probe(context.Background(), c.dev); r.Usable || !strings.Contains(r.Why, c.want) {
			t.Errorf("%s: %+v, want %q", c.dev, r, c.want)
		}
	}
}
