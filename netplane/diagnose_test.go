package netplane

import (
	"reflect"
	"testing"
)

func TestDiagnose(t *testing.T) {
	hosts, spines := []string{"a", "b", "c"}, []string{"x", "y"}
	// see is every pair over every spine, alive unless dead says so.
	see := func(dead func(from, to, spine string) bool) (out []Sight) {
		for _, f := range hosts {
			for _, h := range hosts {
				for _, s := range spines {
					if f != h {
						out = append(out, Sight{From: f, To: h, Spine: s, Alive: !dead(f, h, s), Routed: s == "y"})
					}
				}
			}
		}
		return out
	}
	either := func(h string) func(f, o string) bool { return func(f, o string) bool { return f == h || o == h } }
	for name, c := range map[string]struct {
		dead func(f, h, s string) bool
		cuts []Cut
		want []string
	}{
		"well":  {func(_, _, _ string) bool { return false }, nil, nil},
		"link":  {func(f, h, s string) bool { return s == "x" && either("b")(f, h) }, nil, []string{"link of host b to x passes nothing: its traffic takes other paths"}},
		"cable": {func(f, h, s string) bool { return s == "x" && either("b")(f, h) }, []Cut{{"b", "x", "s1", "without carrier"}}, []string{"link s1 of host b to x is without carrier: its traffic takes other paths"}},
		"spine": {func(_, _, s string) bool { return s == "x" }, nil, []string{"spine x passes nothing on: traffic takes other paths"}},
		"liar":  {func(_, _, s string) bool { return s == "y" }, nil, []string{"spine y passes nothing on, though routing says it works: traffic takes other paths"}},
		"host":  {func(f, h, _ string) bool { return either("c")(f, h) }, nil, []string{"host c: no path leads to it"}},
		"host and spine": {func(f, h, s string) bool { return s == "x" || either("c")(f, h) }, nil,
			[]string{"host c: no path leads to it", "spine x passes nothing on: traffic takes other paths"}},
		"pair": {func(f, h, s string) bool { return s == "x" && f == "a" && h == "b" }, nil, []string{"spine x does not lead from a to b"}},
		"all": {func(_, _, _ string) bool { return true }, nil,
			[]string{"spine x passes nothing on: traffic takes other paths", "spine y passes nothing on, though routing says it works: traffic takes other paths"}},
	} {
		if got := Diagnose(see(c.dead), c.cuts); !reflect.DeepEqual(got, c.want) {
			t.Errorf("%s: %q, want %q", name, got, c.want)
		}
	}
	if got := Diagnose(nil, nil); got != nil {
		t.Errorf("nothing seen: %q", got)
	}
}
