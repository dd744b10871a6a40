package notifier

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"maps"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"

	"go.uber.org/zap"
)

// Reload reads pipelines, definitions and their settings anew, and takes them
// whole: after an error, which says file, line and what to change, everything is
// as it was. What transformers that did not change remember is kept, and so are
// publishers. It says in the log what has changed, and which settings need a
// restart. It returns when deliveries are handled by the new ones.
func (n *Notifier) Reload(ctx context.Context, cfg Config) (err error) {
	defer func() {
		result := "done"
		if err != nil {
			result = "refused"
		}
		n.m.reloads.WithLabelValues(result).Inc()
	}()
	next := n.cfg // but for what can be reloaded
	next.Pipeline, next.EventPipeline, next.MaxSeries, next.SeriesAge = cfg.Pipeline, cfg.EventPipeline, cfg.MaxSeries, cfg.SeriesAge
	next.TelemetrySecretFile = cfg.TelemetrySecretFile
	to, from := &next.Notifications, &cfg.Notifications
	to.MeterDefinitions, to.EventDefinitions, to.Settings = from.MeterDefinitions, from.EventDefinitions, from.Settings
	cfg.Partitions = n.cfg.Partitions // the program's own
	if changed := differences("", reflect.ValueOf(next), reflect.ValueOf(cfg)); len(changed) > 0 {
		n.log.Warn("settings that need a restart of the notifier have changed; they are not used yet", zap.Strings("settings", changed))
	}
	old := n.setup // which only a reload changes
	s, err := n.newSetup(next, old)
	if err != nil {
		return err
	}
	k, err := n.newKeeper(s)
	if err != nil {
		return err
	}
	m := &memory{keeper: k, m: &n.m}
	n.mu.Lock()
	kept, err := m.adopt(ctx, n.memory)
	if err == nil {
		n.setup, n.memory = s, m
	}
	n.mu.Unlock()
	if err != nil {
		if failed := s.close(old); failed != nil {
			n.log.Warn("a publisher of the configuration that is not used did not close", zap.Error(failed))
		}
		return err
	}
	if err := old.close(s); err != nil {
		n.log.Warn("a publisher that is used no more did not close", zap.Error(err))
	}
	changes := changesOf(old, s)
	if len(changes) == 0 {
		n.log.Info("configuration reloaded; nothing has changed")
		return nil
	}
	n.log.Info("configuration reloaded", zap.Strings("changed", changes), zap.Int("transformers_that_go_on", kept))
	return nil
}

// differences returns the names of the settings that two configurations have not
// in common, as the file has them.
func differences(prefix string, a, b reflect.Value) (names []string) {
	for i := range a.NumField() {
		name, _, _ := strings.Cut(a.Type().Field(i).Tag.Get("yaml"), ",")
		switch x, y := a.Field(i), b.Field(i); {
		case x.Kind() == reflect.Struct:
			names = append(names, differences(prefix+name+".", x, y)...)
		case !reflect.DeepEqual(x.Interface(), y.Interface()):
			names = append(names, prefix+name)
		}
	}
	return names
}

// changesOf returns what a reload has changed, sorted.
func changesOf(old, s *setup) (changes []string) {
	compare := func(what string, before, after map[string]string) {
		for name, text := range before {
			if now, ok := after[name]; !ok {
				changes = append(changes, what+name+" is gone")
			} else if now != text {
				changes = append(changes, what+name+" is another one")
			}
		}
		for name := range after {
			if _, ok := before[name]; !ok {
				changes = append(changes, what+name+" is new")
			}
		}
	}
	pipelines := func(s *setup) map[string]string {
		all := s.pipe.Describe()
		if s.events != nil {
			maps.Copy(all, s.events.cfg.Describe())
		}
		return all
	}
	publishers := func(s *setup) map[string]string {
		all := map[string]string{}
		for _, t := range s.targets {
			all[t.name] = ""
		}
		return all
	}
	compare("pipeline ", pipelines(old), pipelines(s))
	compare("publisher ", publishers(old), publishers(s))
	compare("definitions ", old.files, s.files)
	if a, b := old.cfg.Notifications.Settings, s.cfg.Notifications.Settings; !slices.Equal(a, b) {
		changes = append(changes, "setting notifications.settings")
	}
	if old.cfg.MaxSeries != s.cfg.MaxSeries {
		changes = append(changes, "setting max_series")
	}
	if old.cfg.SeriesAge != s.cfg.SeriesAge {
		changes = append(changes, "setting series_age")
	}
	slices.Sort(changes)
	return changes
}

// digests returns what tells whether files of definitions have changed. One that
// cannot be read is told by its error: who loads it has said so.
func digests(paths []string) map[string]string {
	all := map[string]string{}
	for _, path := range paths {
		files := []string{path}
		if info, err := os.Stat(path); err == nil && info.IsDir() {
			files, _ = filepath.Glob(filepath.Join(path, "*.yaml"))
		}
		for _, file := range files {
			if file == "" {
				continue
			}
			data, err := os.ReadFile(file)
			if err != nil {
				data = []byte(err.Error())
			}
			sum := sha256.Sum256(data)
			all[file] = hex.EncodeToString(sum[:])
		}
	}
	return all
}
