package fault

import (
	"errors"
	"reflect"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/cairnstore/cairn/proto/status"
)

func TestParse(t *testing.T) {
	s, err := Parse(`
		# a storm
		every 3s..6s kill host
		at 10s kill meta leader   # whoever
		at 20s..25s pause host-2 800ms
		every 1m hold meta 5s..10s
		keep 2 host
		keep 0 meta
	`)
	if err != nil {
		t.Fatal(err)
	}
	want := Script{
		Rules: []Rule{
			{Every: true, When: Span{3 * time.Second, 6 * time.Second}, Do: Kill, Target: "host"},
			{When: Span{10 * time.Second, 10 * time.Second}, Do: Kill, Target: "meta leader"},
			{When: Span{20 * time.Second, 25 * time.Second}, Do: Pause, Target: "host-2", For: Span{800 * time.Millisecond, 800 * time.Millisecond}},
			{Every: true, When: Span{time.Minute, time.Minute}, Do: Hold, Target: "meta", For: Span{5 * time.Second, 10 * time.Second}},
		},
		Keep: map[string]int{"host": 2, "meta": 0},
	}
	if !reflect.DeepEqual(s, want) {
		t.Fatalf("got %+v\nwant %+v", s, want)
	}
	if again, err := Parse(s.String()); err != nil || !reflect.DeepEqual(again, s) {
		t.Fatalf("its text %q reads as %+v, %v", s, again, err)
	}
}

func TestParseSaysWhatIsWrong(t *testing.T) {
	for text, want := range map[string]string{
		"now kill host":               "write at|every TIME",
		"at 3s kill":                  "write at|every TIME",
		"at soon kill host":           `"soon" is no time`,
		"at 1s..x kill host":          `"1s..x" is no time`,
		"at 5s..3s kill host":         "no range of times",
		"at -5s kill host":            "no range of times",
		"at 10000h kill host":         "out of range",
		"every 0s kill host":          "out of range",
		"every 1ms..5s kill host":     "out of range",
		"at 3s melt host":             `"melt" is no fault`,
		"at 3s release host":          `"release" is no fault`,
		"at 3s kill host 5s":          "a kill has no length",
		"at 3s kill meta leader soon": "a kill has no length",
		"at 3s pause host":            "say for how long",
		"at 3s pause host 1s 2s":      "say for how long",
		"at 3s pause host 0s":         "out of range",
		"at 3s hold host 11m":         "out of range",
		"keep two host":               `"two" is not a number`,
		"keep -1 host":                `"-1" is not a number`,
		"keep 2 disk":                 "write keep NUMBER host",
		"keep 2":                      "write keep NUMBER host",
		strings.Repeat("at 1s kill host\n", maxRules+1): "at most 10000 rules",
	} {
		s, err := Parse("\n" + text)
		if !errors.Is(err, status.Invalid) || !strings.Contains(err.Error(), want) || !strings.HasPrefix(err.Error(), "line ") {
			t.Errorf("%.40q: got %v, want Invalid with %q and the line", text, err, want)
		}
		if len(s.Rules) > 0 {
			t.Errorf("%.40q: an error came with rules", text)
		}
	}
}

// drawScript is any valid script.
func drawScript(t *rapid.T) Script {
	span := func(name string, lo, hi int64) Span {
		a := rapid.Int64Range(lo, hi).Draw(t, name)
		return Span{time.Duration(a), time.Duration(rapid.Int64Range(a, hi).Draw(t, name+" max"))}
	}
	s := Script{Keep: map[string]int{}}
	for range rapid.IntRange(0, 6).Draw(t, "rules") {
		r := Rule{Every: rapid.Bool().Draw(t, "every"), When: span("when", int64(500*time.Millisecond), int64(10*time.Second)),
			Do:     rapid.SampledFrom([]Verb{Kill, Pause, Hold}).Draw(t, "do"),
			Target: rapid.SampledFrom([]string{"host", "meta", "host-1", "meta-2", leader}).Draw(t, "target")}
		if r.Do != Kill {
			r.For = span("for", 1, int64(10*time.Second))
		}
		s.Rules = append(s.Rules, r)
	}
	for _, kind := range kinds {
		if rapid.Bool().Draw(t, "keep") {
			s.Keep[kind] = rapid.IntRange(0, 4).Draw(t, kind)
		}
	}
	return s
}

func TestScriptsSurviveTheirText(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		s := drawScript(t)
		got, err := Parse(s.String())
		if err != nil || !reflect.DeepEqual(got, s) {
			t.Fatalf("%v\nreads as\n%v, %v", s, got, err)
		}
	})
}

func FuzzParse(f *testing.F) {
	f.Add("every 3s..6s kill host\nat 10s pause meta leader 1ms # x\nkeep 2 host\nat 1s hold a 1m..2m")
	f.Fuzz(func(t *testing.T, text string) {
		s, err := Parse(text)
		if err != nil {
			if !errors.Is(err, status.Invalid) {
				t.Fatalf("%q: %v has no kind", text, err)
			}
			return
		}
		again, err := Parse(s.String())
		if err != nil || !reflect.DeepEqual(again, s) {
			t.Fatalf("%q is %+v, whose text %q is %+v, %v", text, s, s, again, err)
		}
	})
}
