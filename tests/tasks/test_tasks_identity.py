"""The model is asked who it is in words that it was not trained on."""

from nanochat.tasks.identity import TOPICS, identity, questions


def test_no_question_is_in_both_splits() -> None:
    train, test = questions("train"), questions("test")
    assert len(set(train)) == len(train)
    assert not {text.lower() for text in train} & {text.lower() for text in test}


def test_every_topic_is_trained_on_with_each_answer_and_examined() -> None:
    train, test = identity().problems("train"), identity().problems("test")
    assert len(train) == sum(len(topic.train) * len(topic.answers) for topic in TOPICS)
    for topic in TOPICS:
        assert topic.test
        assert {problem.answer for problem in train} >= set(topic.answers)
    assert {problem.answer for problem in test} <= {problem.answer for problem in train}
