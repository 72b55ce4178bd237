package place

import (
	"bytes"
	"reflect"
	"strings"
	"testing"

	"github.com/cairnstore/cairn/placement"
)

// A trace that was written and read again gives the same placements.
func TestTraceFileKeepsEverything(t *testing.T) {
	for _, n := range []string{"churn-0.70", "rack-loss", "drain"} {
		tr, err := Synthetic(n, 60, 5)
		if err != nil {
			t.Fatal(err)
		}
		var b bytes.Buffer
		if err := tr.Write(&b); err != nil {
			t.Fatal(err)
		}
		again, err := Read(&b, n)
		if err != nil {
			t.Fatal(err)
		}
		if !reflect.DeepEqual(tr.Hosts, again.Hosts) || !reflect.DeepEqual(tr.Events, again.Events) {
			t.Fatalf("%s is another trace after a file", n)
		}
		x, err1 := Replay(tr, Config{Policy: placement.NearData, Sample: 10, Seed: 1})
		y, err2 := Replay(again, Config{Policy: placement.NearData, Sample: 10, Seed: 1})
		if err1 != nil || err2 != nil || x.Placements != y.Placements {
			t.Errorf("%s: other placements after a file (%v, %v)", n, err1, err2)
		}
	}
}

func TestBadTraceFilesAreRefused(t *testing.T) {
	const h = "host a r 1000 1000\n"
	for _, text := range []string{"", "host a r 0 1", "host a r x 1", h + "5 vm", h + "5 vm v 1 1 0 - 0 9:1:1", h + "5 vm v 1 1 0 - 0 0:1", h + "5 vm v 1 1 0 - 0 0:-1:1",
		h + "5 vm v 1 1 0 - x", h + "5 rebalance\n4 rebalance", h + "5 nonsense", h + "5 fail 1", h + "x fail 0", h + "1 rebalance\n" + h, h + "1"} {
		if _, err := Read(strings.NewReader(text), "t"); err == nil {
			t.Errorf("%q is read", text)
		}
	}
	if tr, err := Read(strings.NewReader("# c\n"+h+"5 vm v 1 1 0 - 0 0:1:1\n"), "t"); err != nil || len(tr.Events) != 1 {
		t.Errorf("got %v, %v", tr, err)
	}
}

// The report of a small fleet has a row of every policy and draws every plot.
func TestReportDraws(t *testing.T) {
	var rs []*Result
	for _, name := range Names {
		tr, err := Synthetic(name, 60, 1)
		if err == nil {
			err = Compare(tr, Contenders(), func(r *Result) { rs = append(rs, r) })
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	if want := len(Names)*len(placement.Policies) + 3*len(Rivals); len(rs) != want {
		t.Errorf("%d results of all policies and, where VMs churn, of the naive ones; want %d", len(rs), want)
	}
	var b bytes.Buffer
	if err := Markdown(&b, rs); err != nil || strings.Count(b.String(), "\n") != len(rs)+2 {
		t.Errorf("the table: %v\n%s", err, b.String())
	}
	for name, f := range Figures {
		b.Reset()
		if err := Plot(&b, f.Title, f.Unit, rs, 60, f.Of); err != nil || strings.Count(b.String(), "<title>") < 3 || !strings.HasSuffix(b.String(), "</svg>\n") {
			t.Errorf("%s: %v\n%s", name, err, b.String())
		}
	}
}
